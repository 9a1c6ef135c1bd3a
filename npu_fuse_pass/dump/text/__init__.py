"""The files of a dump that list updates, groups, kernels and GE graphs as text."""
