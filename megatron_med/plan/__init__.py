"""Memory and time of a configuration on a cluster, without the cluster."""
