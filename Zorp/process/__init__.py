"""What every daemon of ours is made of: log sinks, signals, timers, the service manager."""
