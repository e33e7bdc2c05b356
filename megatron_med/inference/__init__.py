"""Text, log-likelihoods and token choices of a trained model under tensor, pipeline and data parallelism."""
