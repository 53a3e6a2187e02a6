"""`make learn-scenes`: coloured digits in scenes, with captions, questions and dialogues."""
