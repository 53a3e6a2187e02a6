"""`make learn`: 8 x 8 digits with captions, and what each choice of the model is worth."""
