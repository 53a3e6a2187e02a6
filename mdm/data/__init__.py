"""What a training step reads: schema, manifest, sample order, loader, batch."""
