"""A comparison as text, as JSON lines and as a page."""
