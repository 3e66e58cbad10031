"""Files, messages, seeds and worker processes: what every part uses."""
