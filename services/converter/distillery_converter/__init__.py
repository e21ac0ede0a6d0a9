"""The converter: a published denoiser becomes ONNX files or TensorRT engines that compute the same."""
