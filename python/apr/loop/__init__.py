"""The loop: scores become tokens, tokens become text, step after step."""
