"""The vision tower and the positions of image prompts."""
