"""What a norm is: its behaviour as data, the probe that finds it, the modules that go into converted models."""
