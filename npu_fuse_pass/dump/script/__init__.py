"""The files of a dump that are Python: the captured graph, and the fused one as a script that runs."""
