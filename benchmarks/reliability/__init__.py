"""What a run survives: kills, wrong bits, full disks, and other runs."""
