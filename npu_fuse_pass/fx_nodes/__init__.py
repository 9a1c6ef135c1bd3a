"""What an FX node calls, what torch recorded of its result, and what it writes."""
