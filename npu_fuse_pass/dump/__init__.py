"""What a compile leaves behind for people to read: files and a page."""
