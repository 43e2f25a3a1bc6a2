"""What differs between model families; one module each, all behind `base.Family`."""
