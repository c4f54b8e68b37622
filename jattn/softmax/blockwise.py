from jattn.softmax.reference import attend
