"""What compute, communication and memory cost: pure functions of numbers, and the event simulator."""
