"""Memory layout: adjacent tensors of a group, and their binding to a graph's inputs."""
