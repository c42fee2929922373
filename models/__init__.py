"""Networks: frozen encoders, part learners, the AdaIN decoder, the masked autoencoder, heads."""
