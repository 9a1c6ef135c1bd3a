"""Dumps: readable files and a page for one compile."""
