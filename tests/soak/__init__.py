"""Traffic of all kinds for as long as you like, and then: is anything left over? `just soak MINUTES`."""
