"""A dict of frames as pandas 2.2 with numpy 2 and pytz pickled it, in protocols 2 and 5: base 85 of zlib.

INFY: published form · TCS: with `Adj Close` and a named index · SBIN: float32, naive · SPLIT: lists and ISO
texts · STAMPS: `to_dict("split")`, an index of Timestamps. Five days from 2026-11-16, closes 1.5 to 5.5.
"""

from __future__ import annotations

import base64
import zlib

_TEXTS = {
    2: """
c-qxhd3aRS6`w#7!UGjBhM)owQ6C~92}=SZnS=m_M+SNmaj=~ZZzeC?NhUM%yYGz<$|$0lfZgb7OKnSATeP*6mM)gs+Rk*}_kFQDcGcR
&u6oaXZzh>Z`ZfK&{?qyL-FxnRXSwH`-#Pc@$czkpda%;x^K}Qd?L|d2WhVMfyD^#+R^xy$hb^tkbj)pv!i*JnU}grDu0(ivzd%)qL@e
Q0B4Nhu#$hvI?ze=kb;gs?p&oaop}N2xj>jVQIKLK7CsMKKP}~YfNI=7^Xd*qF8fgqG#lz{i6ElS{N3^i8qRE8qh;-D^P~);`QmOii*@
kZvT2zYlTTxrH5=3a26ReO&j$m%ETF!CPi6xqGK^7M>Tr`Gx4D)rP!l*Q=vRL4$>~}^|Qu5;93@I_thT7xD#&8Kkoo>uj+BRWfAQ0H`j
Qpv=@HwcD9OrX__xTFH{F!!-^1D-wH_!9tTL1LE*L!pRRQohF=O6YMD!q-l-n_t@>-<>6WehH5xXi)jk!Uy^NylWM6XCFC$750H{bIu>
qf#-3B@9cA8DnT*xPs5(HCzRH8JE$!l3_VTuY#g?6?X#`Ys1wPuxl7}88ALMR4Y`dbjhoEj?{Yd5^vVMxy74tEgg3y!*vc;MfhUM7oDw
<VKtqtiJ>`*mJrtHWw7kG4qA3&#I!9foUjgryJ<(m+JDdHajeT=y$kn#SqEq>INnB%Z(!I+j#rK1de7}$ZP-L^-@vfBfRn>$FLl1%fj@
FQgbr8pu9THPry_5R?dRAMoGHnj$ph#LR!M40JZW3ls*t-U8BY&e*k(D{9#J9*S(>;pkj|o;VaJpX$)j6NY}m40=exY6=c4f+WXjlgX3
(Sa*3v>&#V6H=QzHk*OF7WhLHnI%bja%05GXO^icDdr!!6`pJC;^ISs56^ZieTSNUFlLy{RbHcT1OBuuOKT-VFNO;HDEX2REtQBy8+ag
mVZtM^hutAuXKJ5Y&Tn<z|N+GglkQ_z>lJZ_gvl@VR;D>BB7!p3CsObfl2}5T*b53}G+*`@Hn`w85nGM;M~IQ8@|q8T9KC^xkPKg7W~w
epNgb4tN&ww1cWJHWA`;C+z&$l##!`UXuBvxx1=zC*8&TI-*>9U+#2cYyJTua}TxU@63(L1%^m_oMG5OB9cK;S6~Vc2n$G+rq8j}lpGk
aEr&uX;}4_acou@eR=^8K%_z6vWRTXq4Pn_y+-hk2CcY<~9>akMS2#S#Fk)qKh~Wk9MIrNo!@=2J5vgkh8MO`%TaKwJ>$VVXR|hm5N7y
)$!5yxdfw;Nf#?cJ!3@)V4@p$rp9qv!3WP_5a568`j6}NHMF*_Ym3G3U^i&0K@RW^e$omcVd@rHGb5_g>8?qa)tA+P(tYS}NMw7!_(B@
SL1;i@N}V0hWMi!Ub^U%~LoVo!b**Z=EQ`)V?C55sF5yf(sBdp*hUx^Xl2l9|^tyrF33jcz1Yj7M@B?wle!Z(?|}gSSviuQIBsrQgT!R
<ijvhSOuXKZFN#zLv{w{C3%U3P*Sc9pOQSchV86NAWJcS$5Tjbl%Cg@GicUZ&M)a=pSrwd*~V2Hs9@`^gRq`xxr;SdoQUB@M6PxAH(}O
b&(Hb@UYH{&EtdoW<H?@oFnTWVtB;s0UsXk0Ux0r@F>Gar|tnCo6rMt<bR&w<AomZi7Y<p;8Xvb9`I?>{uzePI{2LI0iWlofIWsU$PlQ
?q~3`y%3yqn;mfjQzryfUewb(YZTxmFOYm!4*4@{+TU#X1+u0q!H&k(bGlOrH71y^ZBHv;7u8Igj;(K092G-*H6q6q?{BY{mz>k!}P_W
1yX?JVH@23R~r~Fgx<cadNPbHD3od!wlqn#5poRLFA2Z?r2Ey|&xQ(n29c#NX-V}_qN_$gt~=RPZb#_)5(;4c_{Ig0ZkJnmueR|J@iE{
uN7@EaFKzb%8&?-+hR4v8no{U;gzFf}BengEGE(sBO8@aF;~{*uMh4*pt1-rp$Be`olIhrEA|oB0=+d4>s}e0WT0NmS66qA@W;E~Py&Q
_f6O%F(kbswABi)pB&iEIFzKwW<US<sTIx!ksU7E_Y&9?m<P*UY5Hze@>CX+}WmXLZdHtx+_1LyGPQZ#xpfrnbMTvIixrv=F%s^rnrDM
RA|M8iti#hT3InqE#?#7I6%b$S|81bi)nUYN_R-_?w#FzqE>EZ#3jn#){v+pA|w{lw7vZaw*zf2^z!ZPj}?fg3!j#|gcTC?N~p-|uPN{
r)l?RUwMC&tu26y3Kd;=Re{O-;Tok(06)N)9mYei1C=gvmq03yMB5(a9lXV56+Y_>av*Z+|=cGiz<x)XNEG9Lo&Xe*<DwfElT5<U*6-#
MF_p7{rMFTA;(oyQG;tE>QZGEeHo{D9ZGxc3PC&iUY{c@##5#2IPE$de`H?L}5-`CW%QT?rKTDNgclemgBm9Vsyvs^uirLCOhnn^4h%3
1VsmX@Y+mKEehTKU!6*U_`PS6r(QwUYc8bbY#x=qVpl>QU>M!>Nh?+!i-Av5F+`uJN6)pGq0$>jONf^SwR69`D)N-P<P`Rf()t$Zw*`)
Ev>QRxNTIENYNf!bz!Nu)woM@vJT3nO}GE{6wC0if4TZ&pvsDJU)S^Rq?cy@W{JmbRy3N#j}w@HRz(~`cf2aDnZc=6H&Ce6h-Z2DDsn1
s@x8@ayzG6xrQcdV#{<()~J=-UDK^qV~OP6I^7~QbjiJKy47j4SXMgS_$<R{#ti
""",
    5: """
c-qxg&2Jk;6kjLne3(R}NtC9vgs4Ku6{>O4kEB&qJBgLn*?1e(0SYK=*Xwb{$=Yl7gEWYWAd#d&0|a$iq>4jty&!?a4RNSI{0p3WY;Qq
aDlX;C?5?wROydF)V(r;CJMX=j_wk!IvlhPfYq!9k>oiKlv^@P5B?l^MIj>qV%`j1{V5%iVNoPv6)oI?pNsoO@xwukVG$|PhiWkc^GRv
xN#Y$>fT|}luN!O%qXv-P*8`Q~wr=jS@oVBY$$@7X+t`xOp9Vt1c!-V_FPN}jQQ~31IM`lr@<T<5a8l{|5DDWwxx9<wUXD8uxk}m1+Xp
cwxlg;r5J^CQg+`NxHzUX~-d9>G~14&B4+##TOd$q#CNm>fybnC_@y-cH0D+!&WvMkR$frq~&!KOJ$l)@X7gr=wsVx%MI6m`2;hM0vdy
{NHiBmsm%Y!<17y>U10iQbNS21h*F@6jQT`utIkQru5kiUE7@U;}GH%o=={*@B0eZNY^%=mMZ)uof11bPZXtoN57>B1##pC}}nZcH<Ky
?DsjW@&GjeNigpv2fS5HQ-!#7DJIg4vSpi&W;6X>(he(eCX2#4oeJfsYdzSx&ON$R6X6f*BAfu9wwTf4r3xxjB3>*mVoF+PjTH#+lx{G
q+uksAfFDI5OvEzV3bM1ovhiXgSHTNp7fT3I)XV)%c>`6yv!uIz4E)DuNMFtV;GV%OM--*9dTn=y$f*g&nN+o9lxHwH5;Vir3R+QJY{C
oG%u8**i82ccITTdoxU@V1o6^^te>>$N)-M1~xo87?84O$O4<K%pRYqEr3fq&UYr-n3uStf!%rct!@v<a9Of&Nw!%hyL!{=GLaI!90nc
ZZGd*BBPPq7t29DX*SjU{g?Dr{T7SEPr7!uC&}gzqqVVBpR}Mz7wBjXeVT?fB2@j|Q1IGd>Iz1ieSe;hJFE7AHobU?CgaYE8MQ3T^RBw
<(&cVZ^<MzKJY@N)cSZi;lBNb9l~01meP?0^x$v$?)u#QKf`zl>>YMkfqu-6v*pr-h!?!^6o)Z*NqiR$vYL;*bsU}S91ue;|<Hnk=FUC
EXAUm0Njov?k@k|R6l&stz=&9IQq{@RkWrM#TrfaESA+)wXoC{tZJLAs^L?3jPKFC*lmN4X;wt=43_XL&S05zPUM${-SWYzh7S+?I)2l
g<sJO)?k>cdm(~K`QW#_7zuhGGBiZ7pCL*f=bQjzBGyFOJ0&n9lLFy*7TO6HYb}}tDfM>p%h_!?ZpCq(3Xm^u)zwfiL#9rC^@I4IlDzt
5A-$5Im03B#M(1s@k;o>9@PT}M}2Uxf!)k5t7wqBd+$^G*7x3cjsCstT~VlF@;g&(%tzhSiV=+}QRdgc3g8WJnqOa1cIp2W)grZk+Ln@
!KV2NOgE{udHEZZ0qQW#mHQf!}%TvtD*Ph$&R%k{!NWbqdk%oD3@Xa><_hrIKBK=X_A1D%W4XRI=Caq=E`nxxqb44fvh3r+`Si#?F3-J
HI3t?j-@cmjs<(5;X6U@V<9RAYpzH;0lLE<D;jKkBl52IXxebpXL8o<EPG^h|>UX>?yqQr|{1FHE%Rt&qEGr%g#?^=CUlMOD}{3fmt}z
=n&-h23svv;2iARy?0cH*%|+7hhI`;yd1@P=1PVg^69L5$V(CSUU~(V;i7KUk(Z9aKt0c`M2&fFb!yCWD^`$)mij!uno8BP09%SQi)g9
8Stv_G&0<)JHVa;96d}in{R!E9A%F
""",
}

PICKLES = {
    protocol: zlib.decompress(base64.b85decode("".join(text.split()))) for protocol, text in _TEXTS.items()
}
