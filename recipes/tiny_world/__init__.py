"""Training and scoring of Tiny World: the data, autoencoder, CLIP, judge and UNet stages."""
