"""Real jobs of every kind under random kills, stops, full disks, wrong clocks and lost messages: `make chaos`."""
