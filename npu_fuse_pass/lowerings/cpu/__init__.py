"""Steps as generated C++, compiled once and kept on disk."""
