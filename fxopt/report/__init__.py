"""fxopt.report"""
