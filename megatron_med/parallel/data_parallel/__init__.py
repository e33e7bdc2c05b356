"""What data-parallel ranks do with gradients and weights: buckets with a sharded optimizer, or FSDP2."""
