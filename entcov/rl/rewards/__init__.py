"""What a response is worth: the rules of the data sets, and the threads that apply them."""
