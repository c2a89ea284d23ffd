"""fxopt.ir"""
