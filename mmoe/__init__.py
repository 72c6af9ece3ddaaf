"""mmoe: pretraining of multimodal mixture-of-experts models."""
