"""What a soft prompt is, where it is kept, and how it is made."""
