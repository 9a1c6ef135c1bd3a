"""torch's operations as expressions."""
