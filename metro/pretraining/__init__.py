"""METRO pretraining: masking, the auxiliary model, the joint model and its losses."""
