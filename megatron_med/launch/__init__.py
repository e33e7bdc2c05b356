"""How a run starts and how it ends: rendezvous, process group, preflight, failure report."""
