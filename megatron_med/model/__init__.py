"""Model families on the parallel layers."""
