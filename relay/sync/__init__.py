"""What changed for me: /sync. token (where a client stands), gather (what each part has to say), rooms (the rooms' share),
classic (the long poll and its JSON)."""
