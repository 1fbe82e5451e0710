"""What users hold: sessions, threads, segments, and what happened to them."""
