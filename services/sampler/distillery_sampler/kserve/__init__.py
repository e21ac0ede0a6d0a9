"""KServe v2, `inference.GRPCInferenceService`: its servicer, and its models, tensors and parameters in our words."""
