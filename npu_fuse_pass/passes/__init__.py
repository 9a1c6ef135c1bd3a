"""From updates to updates, groups and graphs: typed values in, typed values out."""
