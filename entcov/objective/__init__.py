"""The policy loss, the token covariance and its selections, the advantages."""
