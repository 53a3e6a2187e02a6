"""`make demo`: digits, emoji and dialogues, from published data to a report with images."""
