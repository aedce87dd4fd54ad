"""Methods of `protocol=federated`: how a server makes one update out of those of its clients."""
