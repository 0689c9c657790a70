"""What runs without a WebUI: samplers, generation on the miniature, the demo that compares the methods, the claims.

The methods and the decision when guidance is on are the very code that the WebUI runs. What is needed beside torch and
numpy is in the optional extra `demo`.
"""
