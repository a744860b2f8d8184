"""The process and its launch: ranks, signals, heartbeat, display, memory."""
