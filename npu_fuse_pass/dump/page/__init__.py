"""The page of a dump: one HTML file that shows the graph before and after."""
