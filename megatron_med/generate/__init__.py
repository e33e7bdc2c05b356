"""Text generation under tensor and pipeline parallelism."""
