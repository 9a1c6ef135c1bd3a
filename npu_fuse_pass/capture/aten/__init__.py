"""What each operation of torch computes, as expressions."""
