"""From raw records to published shards: survey, filters, duplicates, encoding, publishing."""
