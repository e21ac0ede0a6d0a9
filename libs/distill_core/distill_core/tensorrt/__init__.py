"""TensorRT engines: how they are built, opened and fitted to the device."""
