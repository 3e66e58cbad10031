"""The model files: imported by METRO, and copied byte for byte into every exported folder."""
