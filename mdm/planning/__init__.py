"""What a run will need before it starts: memory, time, and a rehearsal of one rank."""
