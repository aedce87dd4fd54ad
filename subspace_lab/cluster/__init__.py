"""From a laptop to a cluster: what a job asks SLURM for, batch scripts, requeueing, and ranks that agree. No torch."""
